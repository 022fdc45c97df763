"""Closed loops: stock layers whose input depends on their own earlier states, read as joint states."""
