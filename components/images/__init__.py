"""Dockerfiles of the components' images."""
