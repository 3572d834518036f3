"""One module per data set, each with `index` and `read` (`valor.data.source.Adapter`)."""
