"""serve-engine: labels over the Open Inference Protocol, for the extra [serve].

room.py holds what waits and runs it; models.py opens and reloads networks; tensors.py and outputs.py turn requests into
jobs and results into answers. rest.py and rpc.py are the two ways in, HTTP and gRPC, service.py what they share,
server.py the ports of both.
"""
