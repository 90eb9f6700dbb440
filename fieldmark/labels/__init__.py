"""Labels of nodes: which concepts a node shows, how sure that is, and which nodes are worth a closer look."""
