"""The engine: what runs next, packed into arrays, run on the device."""
