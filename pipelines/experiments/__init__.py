"""Experiments: arms that share stages, run job by job on one machine, and the document that shows them."""
