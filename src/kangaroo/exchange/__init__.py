"""Exchange with other projects: what they trained, made usable here."""
