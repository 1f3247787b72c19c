"""What happens on the host around the compiled loop: requests and texts."""
