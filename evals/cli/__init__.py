"""What the commands of evaluation share: options and tables."""
