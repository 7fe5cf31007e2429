"""What the package was measured with: each study prints, draws and keeps results."""
