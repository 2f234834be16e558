"""What the choices of the format cost in answers (scripts/format_study): decoder (the model in torch), measure and divergence (the errors), axes (the tables)."""
