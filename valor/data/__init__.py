"""Data: DICOM and report reading, adapters, the dataset artifact, checks, the phantom."""
