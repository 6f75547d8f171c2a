"""Work on tensors alone: factors in place, memory, modes set aside."""
