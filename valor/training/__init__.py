"""What VALOR adds to TRL's trainers."""
