"""The operations of a convolutional network and their gradients, as the equations of the notes.

"Comprehensive Master Notes: CNN", sections 2 to 7. Only arithmetic, comparison and indexing of tensors is used, none of
torch's layers, so that the equations can be read and compared with those layers. They are slow: networks use torch's.

Names are the notes': B images, C channels, H and W rows and columns; input X, output Y, kernels W, biases or shifts
beta, kernel side K, stride S, padding P of each border, loss L, delta_Y = dL/dY.
"""
