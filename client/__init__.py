"""A client for mflux-server: `mflux_client.Client` for programs, `python3 -m client` for people.

Nothing here imports the server; mflux_client.py can be copied and used alone.
"""
