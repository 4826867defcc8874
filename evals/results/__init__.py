"""What was measured, kept item by item."""
