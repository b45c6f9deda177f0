"""All contact with the inside of an engine: how parameters leave its optimizer and come back."""
