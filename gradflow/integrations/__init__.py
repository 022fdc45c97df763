"""Where people look: other packages' trainers and logs; each is imported only where it is used."""
