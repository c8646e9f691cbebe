"""Door: who may call, how much, from where, and in what bytes."""
