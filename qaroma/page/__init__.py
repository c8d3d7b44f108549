"""``qaroma page``: the commands as one window in a browser, for people who do not like terminals.

The page only runs commands, which it shows; a run is a process of its own, and outlives the page. jinja2 writes the
screens on the server, behind Starlette and uvicorn, two packages of 2 MB: little script is left, and the policy sent
with every screen forbids all but that one file. NiceGUI 3 takes 105 MB, and a websocket which such a policy stops.
"""
