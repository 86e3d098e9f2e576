"""JSON schemas as people write them, prepared for the grammar engine: `preparation.prepare`."""
