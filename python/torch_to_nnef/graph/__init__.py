"""From a torch module to a frozen `Graph`: capture with torch.export, name the symbols, forget torch.fx."""
