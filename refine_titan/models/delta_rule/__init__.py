"""What the families around the delta rule share: DeltaNet, GatedDeltaNet, KDA and GatedDeltaProduct."""
