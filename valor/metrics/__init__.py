"""Report metrics, one file each."""
