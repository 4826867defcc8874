"""What fits on the devices, worked out before anything is loaded."""
