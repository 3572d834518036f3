"""The DAG, its targets, the local runner and the command line."""
