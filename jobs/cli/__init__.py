"""What commands share: options, messages, signals."""
