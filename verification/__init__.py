"""Programs that check an answer."""
