"""One file per number format; each exports one `FORMAT` row for the registry."""
