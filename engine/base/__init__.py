"""What every room stands on: errors, PackedBatch, Completion, orders, estimates, memory."""
