"""What fine-tunes, compares and reports, by the method's public face: the commands' work."""
