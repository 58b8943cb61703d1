"""What must hold: coherence, progress, accounting, lifetimes. The oracles observe; they never change the machine."""
