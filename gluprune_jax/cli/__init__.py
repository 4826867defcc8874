"""What the commands share: options, terminal, processes, tables."""
