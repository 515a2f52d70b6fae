"""A router learned from labelled texts, with numpy alone at run time. Knows no training and no cluster."""
