"""The one way to make a KFP component of a wrapper: no installation at run time, the image named when compiling."""

import functools

from kfp import dsl

DEFAULT_IMAGE = "valor-python:unset"
"""Replaced for every task by the target (`pipelines.dag`); "python" keeps KFP's subprocess runner quiet."""

component = functools.partial(
    dsl.component, base_image=DEFAULT_IMAGE, install_kfp_package=False, packages_to_install=[]
)
