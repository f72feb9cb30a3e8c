"""In the place of CRIU's own daemons: lazy-pages and the page server, for a criu dump and a criu restore."""
