r"""A ROS 2 node that says where phrases are in the pictures of a camera.

    python examples/ros2/ground_node.py --ros-args -r image:=/camera/image_raw \
        -p bundle:=/srv/gap/bundle -p phrases:="['the red mug', 'the spoon']"

Subscribes to `image` (sensor_msgs/Image), publishes `detections` (vision_msgs/Detection2DArray)
with the time stamp and the frame of the picture that they are about. It takes the newest picture
when it has answered the last one; those in between are dropped, so that it never lags behind.

This file was not run: there was no ROS where it was written. What is not ROS in it, frames.py, is
under test.
"""

from __future__ import annotations

import rclpy
from frames import list_detections, read_frame
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import Image
from vision_msgs.msg import Detection2D, Detection2DArray, ObjectHypothesisWithPose

from gap_runtime import Bundle, GapError, Grounder


class GroundNode(Node):
    """Grounds phrases in every picture that it has time for."""

    def __init__(self) -> None:
        super().__init__("ground")
        bundle = self.declare_parameter("bundle", "").value
        self._phrases = tuple(self.declare_parameter("phrases", ["the red mug"]).value)
        self._least_score = self.declare_parameter("least_score", 0.0).value
        ratio = self.declare_parameter("ratio", -1.0).value
        backend = self.declare_parameter("backend", "onnxruntime").value
        self._grounder = Grounder(
            Bundle.open(bundle),
            backend,
            ratio=None if ratio < 0 else ratio,
            # Pictures are a camera's: the next answers are much like the last ones.
            follow=True,
            keep_pictures=0,
        )
        self._publisher = self.create_publisher(Detection2DArray, "detections", 1)
        # Best effort and the newest alone: what waits while a picture is answered is old.
        profile = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
        self.create_subscription(Image, "image", self._answer, profile)

    def _answer(self, message: Image) -> None:
        """Ground all phrases in a picture and publish what was found."""
        try:
            pixels, order = read_frame(
                message.data,
                encoding=message.encoding,
                height=message.height,
                width=message.width,
                step=message.step,
            )
            found = self._grounder.ground(pixels, self._phrases, order=order)
        except (GapError, ValueError) as error:
            self.get_logger().warning(str(error), throttle_duration_sec=5.0)
            return
        answer = Detection2DArray(header=message.header)
        for each in list_detections(
            tuple(grounding.reject_below(self._least_score) for grounding in found)
        ):
            detection = Detection2D(header=message.header)
            detection.bbox.center.position.x, detection.bbox.center.position.y = each.centre
            detection.bbox.size_x, detection.bbox.size_y = each.size
            result = ObjectHypothesisWithPose()
            result.hypothesis.class_id = each.phrase
            result.hypothesis.score = each.score
            detection.results.append(result)
            answer.detections.append(detection)
        self._publisher.publish(answer)

    def destroy_node(self) -> None:
        """Give the model up."""
        self._grounder.close()
        super().destroy_node()


def main() -> None:
    rclpy.init()
    node = GroundNode()
    try:
        rclpy.spin(node)
    except KeyboardInterrupt:
        pass
    finally:
        node.destroy_node()
        rclpy.try_shutdown()


if __name__ == "__main__":
    main()
