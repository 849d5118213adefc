"""What stands beneath the scripts: one folder for each of them."""
