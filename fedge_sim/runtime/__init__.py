"""Who carries the messages: grids of our own, and the roster of any grid."""
