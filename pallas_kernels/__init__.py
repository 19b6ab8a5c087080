"""How fast one device does it: per op a public function with the XLA form, and beside it the Pallas body."""
