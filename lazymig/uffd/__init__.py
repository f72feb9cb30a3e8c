"""userfaultfd: the ioctls, and memory that is fetched from another host when it is needed."""
