"""KFP wrappers, one per stage: each body carries values to `valor.stages.run` and holds no logic."""
