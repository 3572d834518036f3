"""VALOR: visual alignment of medical vision-language models for grounded radiology report generation."""
