"""What tests share: stand-ins, made-up memories and models, servers, and faults. No test imports another test."""
