"""Tools: what clients send reaches the template, what models write comes back as calls; nothing opens a turn."""



