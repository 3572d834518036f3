"""Base and expert models."""
