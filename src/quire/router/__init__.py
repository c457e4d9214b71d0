"""The router: sends each request to the replica where it costs least, and moves streams of replicas that die."""
