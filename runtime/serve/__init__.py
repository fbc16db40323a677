"""serve-engine: labels over the Open Inference Protocol, for the extra [serve].

room.py holds what waits and runs it; models.py opens and reloads networks; tensors.py and outputs.py turn requests into
jobs and results into answers. http.py and grpc.py are the two ways in, service.py what they share.
"""
