"""What benchmarks and tests both need: a random model, memories of random slots, a Ray and an engine of their own."""
