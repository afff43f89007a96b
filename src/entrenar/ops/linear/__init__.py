"""Products with a frozen weight, whatever it is held as."""
