"""What both training loops stand on."""
