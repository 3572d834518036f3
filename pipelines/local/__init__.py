"""The local target: the compiled DAG as subprocesses of this machine (`valor run`)."""
