"""The CheXpert-14 vocabulary and the rule labeler."""
